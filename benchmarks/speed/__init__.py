"""How fast onnxcare answers what others answer too, side by side on this machine: one table, JSON and a chart.

    python -m benchmarks.speed [--only NAME ...] [--quick] [--device cpu] [--threads N] [--padding valid]

from the root of the repository, with the packages of the extra `bench`. Every row first makes sure that both sides
compute the same and tells the largest difference. The two sides then take turns, A B A B, on the same threads, and the
median of the ratios of the turns counts. What is slow is measured on an evenly spaced part of its work and scaled by
count; the details of a row say on which part. Networks are random (He) with a fixed seed, the same on both sides.
"""
