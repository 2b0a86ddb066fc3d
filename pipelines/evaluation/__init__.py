"""What a trained model is worth: metrics of classifiers, probes of patch tokens."""
