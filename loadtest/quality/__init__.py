"""Quality of the answers under sparse attention: generated documents, needle questions and their scores."""
