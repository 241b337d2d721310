"""What `train_faces.py` is made of: faces, a small backbone, verification, plots, records."""
