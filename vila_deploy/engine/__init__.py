"""Engine folders: target, precision, manifest, model info, session contract."""
