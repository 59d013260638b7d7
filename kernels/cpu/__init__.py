"""Convolutions and chains of them on CPUs: C++, its compilation, and its Python side."""
