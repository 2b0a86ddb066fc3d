"""Which version of a model is used: gates, promotion, rollback, lineage."""
