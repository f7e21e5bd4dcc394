"""Numpy and scipy algorithms: access graph, cost, solver, permutations. Knows no TVM."""
