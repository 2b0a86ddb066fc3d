"""From a prepared dataset to micro-batches on every rank, in the order of the epoch plan.

The unit of work is a shuffle window: one Ray Data task reads its row groups once, decodes and crops, and yields blocks
of micro-batches as they become ready. A feed spans the segments of all jobs in a worker group, so that nothing waits
between epochs.

| process | module | what it does |
|---|---|---|
| first rank of a node | `driver` | builds the datasets of the node's feed |
| data task | `data_task`, `windows` | turns one window into blocks |
| rank | `rank`, `micro_batch` | turns blocks into micro-batches, and starts the next execution |
| all of them | `channel` | holds the state that they share |

`plan` and `segments` say what is fed, `executions` how tasks are grouped, `blocks` and `buffers` how micro-batches
travel. Only ranks load torch, which costs a process two seconds, and data tasks where they resize a whole image.
"""
