"""The proof of recall: errors on labelled data, beside other caches, and times."""
