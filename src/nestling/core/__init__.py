"""What everything else stands on: value types, config, errors, runtime, storage, metrics, recipes and the pipeline."""
