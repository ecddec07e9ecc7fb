//! Content-addressed stages, manifests and commits over any object store.
