"""Run folders: training writes them, evaluation reads them."""
