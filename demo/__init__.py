"""Small models in the published layouts, real pictures, a small data set, and a run of the main jobs with them."""
