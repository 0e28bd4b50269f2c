"""CvT with adaptive token sampling."""
