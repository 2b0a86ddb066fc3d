"""The method: masked autoencoders in torch and timm, with no knowledge of clusters, storage or tracking."""
