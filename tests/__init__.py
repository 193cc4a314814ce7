"""Tests of dsv3_mini. ``python -m tests`` runs everything that must hold before a commit."""
