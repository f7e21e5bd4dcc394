"""The pipeline around the passes: arms, building, artifacts, locks."""
