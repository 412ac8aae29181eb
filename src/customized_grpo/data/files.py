"""What lies in a folder of data: its files without those that systems and tools leave there, and text as lines."""
