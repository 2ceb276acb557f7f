"""Rectified flow: path, targets, timestep law and loss; ODE solvers and guidance."""
