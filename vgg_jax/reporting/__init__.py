"""Figures and reports of runs and of data, which need the extra `report`."""
