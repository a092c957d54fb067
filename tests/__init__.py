"""Tests of FlashMLA; the layout mirrors the packages."""
