//! What the command says: answers on standard output, progress and errors on standard error.

use std::error::Error;
use std::io::{BufRead, IsTerminal, Write};
use std::process::ExitCode;

pub(crate) struct Screen {
    terminal: bool,
    /// Whether lines of output are wrapped for programs.
    wraps: bool,
}

impl Screen {
    pub(crate) fn new() -> Self {
        Self {
            terminal: std::io::stdin().is_terminal() && std::io::stderr().is_terminal(),
            wraps: false,
        }
    }

    /// The same screen, whose [`Screen::line`]s are JSON if `json`.
    pub(crate) fn for_lines(&self, json: bool) -> Screen {
        Screen {
            wraps: json,
            ..*self
        }
    }

    /// Whether lines are wrapped for programs.
    pub(crate) fn is_for_programs(&self) -> bool {
        self.wraps
    }

    /// A line of a job's output.
    pub(crate) fn line(&self, text: &str) {
        match self.wraps {
            true => self.say(&serde_json::json!({"line": text}).to_string()),
            false => self.say(text),
        }
    }

    /// That something was done: for programs as an answer, for people in passing.
    pub(crate) fn done(&self, json: bool, told: &serde_json::Value, words: &str) {
        match json {
            true => self.say(&told.to_string()),
            false => self.note(words),
        }
    }

    /// An answer. A reader that has gone away is no error.
    pub(crate) fn say(&self, text: &str) {
        let text = text.strip_suffix('\n').unwrap_or(text);
        let _ = writeln!(std::io::stdout(), "{text}");
    }

    /// Something on the way to an answer.
    pub(crate) fn note(&self, text: &str) {
        let _ = writeln!(std::io::stderr(), "{text}");
    }

    pub(crate) fn error(&self, text: &str) {
        self.note(&format!("error: {text}"));
    }

    /// Says an error and its causes.
    pub(crate) fn fail(&self, error: &(dyn Error + 'static)) -> ExitCode {
        self.error(&error.to_string());
        let mut cause = error.source();
        while let Some(error) = cause {
            self.note(&format!("  because: {error}"));
            cause = error.source();
        }
        ExitCode::FAILURE
    }

    /// Asks on a terminal; without one the answer is yes, so that scripts run.
    pub(crate) fn agrees(&self, question: &str) -> bool {
        if !self.terminal {
            return true;
        }
        let _ = write!(std::io::stderr(), "{question} [Y/n] ");
        let _ = std::io::stderr().flush();
        let mut line = String::new();
        let read = std::io::stdin().lock().read_line(&mut line);
        read.is_ok_and(|bytes| bytes > 0) && matches!(line.trim(), "" | "y" | "Y" | "yes")
    }

    /// Rows in columns as wide as their widest cell.
    pub(crate) fn table(&self, header: &[&str], rows: &[Vec<String>]) {
        let mut widths: Vec<usize> = header.iter().map(|cell| cell.len()).collect();
        for row in rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(cell.chars().count());
            }
        }
        let line = |cells: Vec<&str>| {
            let padded: Vec<String> = cells
                .iter()
                .zip(&widths)
                .map(|(cell, width)| format!("{cell:<width$}"))
                .collect();
            padded.join("  ").trim_end().to_owned()
        };
        self.say(&line(header.to_vec()));
        for row in rows {
            self.say(&line(row.iter().map(String::as_str).collect()));
        }
    }
}
