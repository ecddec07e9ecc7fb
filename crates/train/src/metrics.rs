//! What remains of a run to look at: its log, its curve as a picture and as
//! one line of text. Pure functions from records to text.

mod jsonl;
mod sparkline;
mod svg;

pub use jsonl::{parse_log, write_log};
pub use sparkline::sparkline;
pub use svg::loss_curve_svg;
