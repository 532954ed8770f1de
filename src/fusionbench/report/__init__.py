"""Kept results as a page: one HTML file with all tables and charts in it, which loads nothing."""

from fusionbench.report.page import page, write_page

__all__ = ["page", "write_page"]
