"""The table of `mae` commands: their arguments, and which function of `calls` runs each."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mae_core.bench.config import StepConfig
from pipelines.bench.config import (
    DataBenchConfig,
    EmbedBenchConfig,
    FeedBenchConfig,
    PrepareBenchConfig,
    RecipesConfig,
    StartBenchConfig,
)
from pipelines.cli import calls
from pipelines.cli.calls import Invocation
from pipelines.config import (
    PROBE,
    ClassifyConfig,
    CurateConfig,
    DemoConfig,
    EmbedConfig,
    EvaluateConfig,
    ExportConfig,
    ExporterConfig,
    HandoffConfig,
    ImportConfig,
    InspectConfig,
    JobsConfig,
    LineageConfig,
    LookConfig,
    NeighboursConfig,
    PredictConfig,
    PrepareConfig,
    PretrainConfig,
    PromoteConfig,
    PruneConfig,
    ReconstructConfig,
    RegisterConfig,
    RollbackConfig,
    RunsConfig,
    SegmentConfig,
    SubmitConfig,
    SweepConfig,
)


@dataclass(frozen=True, kw_only=True)
class Command:
    """One `mae` command: its arguments and the function that runs it."""

    help: str
    config: type | None
    run: Callable[["Invocation"], dict[str, Any]]
    positional: tuple[tuple[str, str], ...] = ()
    default: Any = None
    """Config to use without --preset; None for the defaults of its type."""
    resumes: bool = False
    """Whether the same command continues what an interrupted one began."""
    takes_words: bool = False
    """Whether its arguments are any words, among which ours would be options."""


def _completion(call: Invocation) -> dict[str, Any]:
    from pipelines.cli.completion import completion

    configs = {name: PretrainConfig if name == "config" else command.config for name, command in COMMANDS.items()}
    script = completion(call.arguments[0], configs)
    return {"shell": call.arguments[0], "script": script, "text": script}


COMMANDS: dict[str, Command] = {
    "prepare": Command(
        help="Turn images into shards and a manifest.",
        config=PrepareConfig,
        run=calls.prepare,
        resumes=True,
        positional=(
            ("SOURCE", "folder or s3:// prefix of images, tars or Parquet, or a list of URIs"),
            ("OUT", "folder or s3:// prefix of the prepared dataset"),
        ),
    ),
    "inspect": Command(
        help="Show counts, sizes, classes and a contact sheet of a source or a prepared dataset.",
        config=InspectConfig,
        run=calls.inspect,
        positional=(("URI", "source of images, or prepared dataset"),),
    ),
    "pretrain": Command(
        help="Pretrain an MAE and register it.", config=PretrainConfig, run=calls.pretrain, resumes=True
    ),
    "probe": Command(
        help="Train a linear or attentive probe on frozen features of a backbone, or classify by kNN.",
        config=ClassifyConfig,
        run=calls.probe,
        resumes=True,
        default=PROBE,
    ),
    "finetune": Command(
        help="Fine-tune a registered backbone as a classifier, or train one from scratch.",
        config=ClassifyConfig,
        run=calls.finetune,
        resumes=True,
    ),
    "evaluate": Command(
        help="Measure a classifier on a split: metrics with intervals, confusion, calibration.",
        config=EvaluateConfig,
        run=calls.evaluate,
        positional=(("OUT", "folder or s3:// prefix of predictions, pictures and report"),),
    ),
    "predict": Command(
        help="Classify every image of a bucket or folder with a classifier, into Parquet.",
        config=PredictConfig,
        run=calls.predict,
        resumes=True,
        positional=(
            ("MODEL", "models:/NAME@ALIAS or models:/NAME/VERSION of a classifier, or the export/ folder of a run"),
            ("SOURCE", "prepared dataset, or any source that `mae prepare` takes"),
            ("OUT", "folder or s3:// prefix of the predictions"),
        ),
    ),
    "embed": Command(
        help="Embed every image of a dataset with a backbone, into Parquet.",
        config=EmbedConfig,
        run=calls.embed,
        resumes=True,
        positional=(
            ("SOURCE", "prepared dataset, or any source that `mae prepare` takes"),
            ("OUT", "folder or s3:// prefix of the embeddings"),
        ),
    ),
    "neighbours": Command(
        help="Find nearest neighbours of embeddings, kNN accuracy and near-duplicates.",
        config=NeighboursConfig,
        run=calls.neighbours,
        positional=(("EMBEDDINGS", "folder or s3:// prefix that `mae embed` wrote"),),
    ),
    "curate": Command(
        help="Rank images by reconstruction loss, and list both ends to be left out.",
        config=CurateConfig,
        run=calls.curate,
        resumes=True,
        positional=(
            ("SOURCE", "prepared dataset, or any source that `mae prepare` takes"),
            ("OUT", "folder or s3:// prefix of losses, ranking, lists and pictures"),
        ),
    ),
    "sweep": Command(
        help="Run trials over mask ratio, decoder depth or other fields.",
        config=SweepConfig,
        run=calls.sweep,
        resumes=True,
    ),
    "reconstruct": Command(
        help="Draw masked images, reconstructions and originals, or an animation over a run.",
        config=ReconstructConfig,
        run=calls.reconstruct,
    ),
    "segment": Command(
        help="Train a linear segmentation probe on frozen patch tokens; measure mIoU.",
        config=SegmentConfig,
        run=calls.segment,
        resumes=True,
        positional=(
            ("DATA", "folder or s3:// prefix with images/ and masks/, or with both below train/ and val/"),
            ("OUT", "folder or s3:// prefix of tokens, head, result and picture"),
        ),
    ),
    "look": Command(
        help="Draw patch tokens as colours and the attention of the class token, for a folder of images.",
        config=LookConfig,
        run=calls.look,
        positional=(("FOLDER", "folder or s3:// prefix of images"), ("OUT", "folder or s3:// prefix of the pictures")),
    ),
    "register": Command(
        help="Register a checkpoint of a pretraining run as a model version.",
        config=RegisterConfig,
        run=calls.register,
        positional=(("RUN", "folder or URI of a pretraining run, or RUN@STEP for one of its checkpoints"),),
    ),
    "promote": Command(
        help="Point an alias to a version that passes a gate against the version that it points to now.",
        config=PromoteConfig,
        run=calls.promote,
        resumes=True,
        positional=(("MODEL", "NAME@ALIAS or NAME/VERSION, such as mae-vit_base_patch16@candidate"),),
    ),
    "rollback": Command(
        help="Return an alias to the version that it pointed to before, by the recorded history.",
        config=RollbackConfig,
        run=calls.rollback,
        positional=(("NAME", "registered model, such as mae-vit_base_patch16"),),
    ),
    "lineage": Command(
        help="Show what a version was made from: runs, datasets, commits, licence and origin, also as a picture.",
        config=LineageConfig,
        run=calls.lineage,
        positional=(("MODEL", "NAME@ALIAS or NAME/VERSION"),),
    ),
    "registry prune": Command(
        help="List model versions that no alias, rollback or lineage needs; with --delete, delete them.",
        config=PruneConfig,
        run=calls.registry_prune,
    ),
    "import": Command(
        help="Register weights of the reference, timm or transformers, or of another site, as a model version.",
        config=ImportConfig,
        run=calls.import_weights,
        positional=(
            ("SOURCE", "a .pth or .safetensors file, a folder of transformers or of this project, or timm:MODEL.TAG"),
        ),
    ),
    "export": Command(
        help="Write a model version for timm, transformers, the reference, ONNX or torch.export, with a model card.",
        config=ExportConfig,
        run=calls.export,
        positional=(
            ("MODEL", "models:/NAME@ALIAS, models:/NAME/VERSION, or the export/ folder of a finished run"),
            ("OUT", "new or empty folder, or s3:// prefix"),
        ),
    ),
    "runs": Command(
        help="List runs with their state, step, last checkpoint and loss.",
        config=RunsConfig,
        run=calls.runs,
        positional=(("URI", "folder or s3:// prefix of one run or of several, such as runs"),),
    ),
    "exporter": Command(
        help="Answer Prometheus with the state of runs, datasets and the registry.",
        config=ExporterConfig,
        run=calls.exporter,
    ),
    "handoff": Command(
        help="Start the trainings that each version with an alias has not had yet, each exactly once.",
        config=HandoffConfig,
        run=calls.handoff,
        resumes=True,
    ),
    "submit": Command(
        help="Run a command on a Ray cluster from a copy of this folder, follow its log, exit with its status.",
        config=SubmitConfig,
        run=calls.submit,
        positional=(("COMMAND", "words of the command, after -- if options precede it"),),
        takes_words=True,
    ),
    "jobs": Command(help="List the jobs of a Ray cluster, follow or stop one.", config=JobsConfig, run=calls.jobs),
    "demo": Command(
        help="Run the whole pipeline on a bundled sample, in minutes.", config=DemoConfig, run=calls.demo, resumes=True
    ),
    "doctor": Command(
        help="Show which Ray, MLflow, storage and devices would be used, and whether they answer.",
        config=None,
        run=calls.doctor,
    ),
    "bench step": Command(
        help="Measure training steps per second against the plain computation and transformers.",
        config=StepConfig,
        run=calls.bench_step,
    ),
    "bench data": Command(
        help="Measure images per second, decoding alone and from S3 to training, against other loaders.",
        config=DataBenchConfig,
        run=calls.bench_data,
    ),
    "bench feed": Command(
        help="Measure what feeding several nodes costs, on this machine, without decoding.",
        config=FeedBenchConfig,
        run=calls.bench_feed,
    ),
    "bench embed": Command(
        help="Measure embedded images per second against the bare encoder and timm behind a DataLoader.",
        config=EmbedBenchConfig,
        run=calls.bench_embed,
    ),
    "bench prepare": Command(
        help="Measure prepared images per second on one core and on several, and against MDSWriter.",
        config=PrepareBenchConfig,
        run=calls.bench_prepare,
    ),
    "bench start": Command(
        help="Measure the time from mae pretrain to its first training step, by stage.",
        config=StartBenchConfig,
        run=calls.bench_start,
    ),
    "bench recipes": Command(
        help="Compare recipes that get equal time, by linear probes.", config=RecipesConfig, run=calls.bench_recipes
    ),
    "config": Command(
        help="Print the full config that a preset and options result in.",
        config=None,
        run=calls.config,
        positional=(("COMMAND", "pretrain, probe, finetune or sweep"),),
    ),
    "completion": Command(
        help="Print a script that completes commands and options in a shell.",
        config=None,
        run=_completion,
        positional=(("SHELL", "bash, zsh or fish"),),
    ),
}
