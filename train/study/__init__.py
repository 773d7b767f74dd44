"""Studies: what a trained model can do, measured on pictures that it was not trained on."""
