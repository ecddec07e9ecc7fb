//! Fused training and decoding operations on plain buffers.
