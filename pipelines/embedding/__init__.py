"""What a model says of every image of a dataset: embeddings, their neighbours, and reconstruction losses."""
