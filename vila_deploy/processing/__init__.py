"""Text, images and video as the model takes them; numpy only, torch is never imported."""
