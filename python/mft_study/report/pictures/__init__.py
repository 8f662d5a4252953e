"""Pictures of a study: by arm, by bytes, of forgetting, of masks that overlap, of the loss surface."""
