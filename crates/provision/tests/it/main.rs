//! What the crate promises, over its public interface.

mod cases;
