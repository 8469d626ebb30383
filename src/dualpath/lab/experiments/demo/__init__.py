"""The main job: real clusters of several systems, one after another, under the same agents; and what came out."""
