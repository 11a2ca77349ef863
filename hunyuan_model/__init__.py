"""What FramePack takes from HunyuanVideo: its VAE and its two text encoders."""
