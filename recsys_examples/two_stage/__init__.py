"""The two-stage example: retrieval, a multi-task ranker, fusion, a diverse list."""
