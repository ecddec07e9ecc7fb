//! The decoder against an oracle, against PEFT's own runs, and against itself.

mod combine;
mod golden;
mod gradients;
mod identities;
mod oracle;
mod saved;
mod serving;
mod world;
