"""Small models in the published layouts, real pictures, and a run of the main job with both."""
