"""Files of weights: read safely, loaded strictly, converted, inherited from a teacher, exported."""
