"""Between the saves: what a training run is watched for."""
