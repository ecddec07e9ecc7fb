//! The logs of a run: one JSON object per record and line.

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Records, such as [`StepRecord`](crate::StepRecord), as JSON lines.
///
/// # Panics
/// If a record does not serialize; this crate's do.
pub fn write_log<T: Serialize>(records: &[T]) -> Vec<u8> {
    let mut log = Vec::new();
    for record in records {
        serde_json::to_writer(&mut log, record).expect("numbers and fixed names serialize");
        log.push(b'\n');
    }
    log
}

/// The records of a log, bit for bit as they were written.
///
/// # Errors
/// The first line that is not a record.
pub fn parse_log<T: DeserializeOwned>(log: &[u8]) -> Result<Vec<T>, serde_json::Error> {
    serde_json::Deserializer::from_slice(log)
        .into_iter()
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::StepRecord;
    use crate::testing::records;

    #[test]
    fn a_log_reads_back_to_the_bit() {
        let records = records(200);
        let log = write_log(&records);
        assert_eq!(log.iter().filter(|&&byte| byte == b'\n').count(), 200);
        let parsed: Vec<StepRecord> = parse_log(&log).expect("our own log");
        assert_eq!(parsed, records);
        assert!(parse_log::<StepRecord>(b"{\"step\": 1}\n").is_err());
    }

    #[test]
    fn a_line_says_what_a_step_was_and_no_time() {
        let line = write_log(&records(1));
        let fields: serde_json::Map<String, serde_json::Value> =
            serde_json::from_slice(&line).expect("one object");
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
