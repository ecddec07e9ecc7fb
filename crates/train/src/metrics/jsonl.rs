//! The loss log: one JSON object per step and line.

use crate::StepRecord;

/// The records as JSON lines.
pub fn write_loss_log(records: &[StepRecord]) -> String {
    let mut log = String::new();
    for record in records {
        log += &serde_json::to_string(record).expect("numbers and fixed names serialize");
        log.push('\n');
    }
    log
}

/// The records of a log, bit for bit as they were written.
///
/// # Errors
/// The first line that is not a record.
pub fn parse_loss_log(log: &str) -> Result<Vec<StepRecord>, serde_json::Error> {
    log.lines().map(serde_json::from_str).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::records;

    #[test]
    fn a_log_reads_back_to_the_bit() {
        let records = records(200);
        let log = write_loss_log(&records);
        assert_eq!(log.lines().count(), 200);
        assert_eq!(parse_loss_log(&log).expect("our own log"), records);
    }

    #[test]
    fn a_line_says_what_a_step_was_and_no_time() {
        let line = write_loss_log(&records(1));
        let fields: serde_json::Map<String, serde_json::Value> =
            serde_json::from_str(&line).expect("one object");
        let names: Vec<&str> = fields.keys().map(String::as_str).collect();
        assert_eq!(
            names,
            [
                "step",
                "epoch",
                "loss",
                "learning_rate",
                "grad_norm",
                "tokens",
                "trained_tokens",
                "examples"
            ]
        );
    }
}
