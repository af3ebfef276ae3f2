"""Workloads of other libraries, one library a file, in environments of their own."""
