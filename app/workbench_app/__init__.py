"""The page: `workbench app`. A file a page; pages hold widgets, what computes is in `workbench`."""
