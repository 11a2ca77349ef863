"""What every room needs and no architecture owns: flags, files, weights, media, devices."""
