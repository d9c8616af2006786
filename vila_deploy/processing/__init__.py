"""Turn text, images and video into the model's inputs; numpy only, torch is never imported."""
