"""One forward pass over the pictures, and what it leaves behind: in memory, on the disk, for another process."""
