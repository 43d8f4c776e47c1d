"""Text and conversations to datasets: readers, records, the encoder and its worker pool."""
