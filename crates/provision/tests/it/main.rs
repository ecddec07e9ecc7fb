//! What the crate promises, over its public interface.

mod agent;
mod articles;
mod cases;
mod clusters;
mod lab;
mod machines;
mod services;
mod ssh;
mod sshd;
mod together;
