"""The output of the decode job: videos, the records that commit them, and the manifest."""
