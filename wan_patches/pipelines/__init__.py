"""What is known of pipelines: their components, devices, stages and frames."""
