//! Stop strings, wherever they fall between tokens.

/// Holds back text that may be the beginning of a stop string, and cuts the
/// stream where one is complete.
///
/// ```
/// use updraft_chat::{StopMatcher, Stopped};
///
/// let mut stop = StopMatcher::new(["\n\nHuman:"]);
/// assert_eq!(stop.push("4.\n"), ("4.".to_owned(), None));
/// assert_eq!(stop.push("\nHum"), (String::new(), None));
/// let (text, stopped) = stop.push("an: more");
/// assert_eq!(text, "");
/// assert_eq!(stopped, Some(Stopped { index: 0 }));
/// ```
#[derive(Clone, Debug, Default)]
pub struct StopMatcher {
    stops: Vec<String>,
    held: String,
    /// Bytes of what is held in which no stop string may end.
    passed: usize,
    includes_stop: bool,
    stopped: Option<Stopped>,
}

/// A stop string was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stopped {
    /// Which of the stop strings, in the order they were given.
    pub index: usize,
}

impl StopMatcher {
    /// Watches for these strings; empty ones never match.
    pub fn new<S: Into<String>>(stops: impl IntoIterator<Item = S>) -> StopMatcher {
        StopMatcher {
            stops: stops.into_iter().map(Into::into).collect(),
            ..StopMatcher::default()
        }
    }

    /// Leaves the stop string in the text.
    #[must_use]
    pub fn including_stop(mut self) -> StopMatcher {
        self.includes_stop = true;
        self
    }

    /// Takes text in; gives out what no stop string can begin in any more,
    /// and whether one is complete. After that it gives out nothing.
    pub fn push(&mut self, text: &str) -> (String, Option<Stopped>) {
        if self.stopped.is_some() {
            return (String::new(), self.stopped);
        }
        self.held.push_str(text);
        if let Some((at, index)) = self.first_match() {
            let end = match self.includes_stop {
                true => at + self.stops[index].len(),
                false => at,
            };
            self.held.truncate(end);
            self.stopped = Some(Stopped { index });
            return (std::mem::take(&mut self.held), self.stopped);
        }
        (self.release(), None)
    }

    /// Takes text in that no stop string may end in; one may begin there, and
    /// end in what is pushed after it. Gives out text as [`push`](Self::push)
    /// does.
    pub fn pass(&mut self, text: &str) -> String {
        if self.stopped.is_some() {
            return String::new();
        }
        self.held.push_str(text);
        self.passed = self.held.len();
        self.release()
    }

    /// All but what may be the beginning of a stop string.
    fn release(&mut self) -> String {
        let out = self.held.len() - self.longest_beginning();
        let rest = self.held.split_off(out);
        self.passed = self.passed.saturating_sub(out);
        std::mem::replace(&mut self.held, rest)
    }

    /// What was held back, when the stream ends without a stop string.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// The match that begins first; of several there, the one given first.
    fn first_match(&self) -> Option<(usize, usize)> {
        let found = self
            .stops
            .iter()
            .enumerate()
            .filter(|(_, stop)| !stop.is_empty());
        found
            .filter_map(|(index, stop)| Some((self.find(stop)?, index)))
            .min()
    }

    /// Where a stop string begins that ends after what was passed.
    fn find(&self, stop: &str) -> Option<usize> {
        let from = (self.passed + 1).saturating_sub(stop.len());
        let from = (from..=self.held.len()).find(|&at| self.held.is_char_boundary(at))?;
        Some(from + self.held[from..].find(stop)?)
    }

    /// The length of the longest end of the held text that begins a stop string.
    fn longest_beginning(&self) -> usize {
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        let mut starts = self.held.char_indices().map(|(at, _)| at);
        let from = self.held.len().saturating_sub(longest.saturating_sub(1));
        starts
            .find(|&at| {
                let begins = |stop: &String| {
                    stop.len() > self.held.len() - at && stop.starts_with(&self.held[at..])
                };
                at >= from && self.stops.iter().any(begins)
            })
            .map_or(0, |at| self.held.len() - at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Splits the text at every character and checks what comes out in all.
    #[track_caller]
    fn check(stops: &[&str], text: &str, expected: &str, index: Option<usize>) {
        for size in 1..=text.len() {
            let mut stop = StopMatcher::new(stops.iter().copied());
            let mut out = String::new();
            let mut stopped = None;
            let chars: Vec<char> = text.chars().collect();
            for piece in chars.chunks(size) {
                let (more, found) = stop.push(&piece.iter().collect::<String>());
                out += &more;
                stopped = found;
            }
            out += &stop.finish();
            assert_eq!(out, expected, "pieces of {size}");
            assert_eq!(stopped.map(|stopped| stopped.index), index);
        }
    }

    #[test]
    fn text_ends_before_the_first_stop_string() {
        check(&["END"], "the END of it", "the ", Some(0));
        check(&["x", "STOP"], "a STOP x", "a ", Some(1));
        check(&["ab", "b"], "cab", "c", Some(0));
    }

    #[test]
    fn what_only_begins_like_one_comes_out() {
        check(&["END"], "the EN", "the EN", None);
        check(&["aab"], "aaaac", "aaaac", None);
        check(&["aab"], "aaab!", "a", Some(0));
        check(&["é\u{301}"], "né", "né", None);
        check(&[], "all", "all", None);
        check(&[""], "all", "all", None);
    }

    /// A text of which the first characters are passed, then one after the other is pushed.
    #[track_caller]
    fn check_passed(stops: &[&str], passed: &str, pushed: &str, expected: &str, stopped: bool) {
        let mut stop = StopMatcher::new(stops.iter().copied());
        let mut out = stop.pass(passed);
        let mut found = None;
        for one in pushed.chars() {
            let (more, now) = stop.push(&one.to_string());
            out += &more;
            found = now;
        }
        out += &stop.finish();
        assert_eq!((out.as_str(), found.is_some()), (expected, stopped));
    }

    #[test]
    fn no_stop_string_ends_in_what_is_passed() {
        check_passed(&["an"], "banan", "a", "banana", false);
        check_passed(&["an"], "ba", "nana", "b", true);
        check_passed(&["nan"], "bana", "na", "ba", true);
        check_passed(&["aa"], "aaa", "a", "aa", true);
        check_passed(&["b", "abc"], "ab", "xb", "abx", true);
        check_passed(&["b", "abc"], "ab", "c", "", true);
        check_passed(&["é!"], "é", "!", "", true);
        check_passed(&["é!", "!"], "aé!", "é", "aé!é", false);
    }

    #[test]
    fn the_stop_string_can_be_kept() {
        let mut stop = StopMatcher::new(["."]).including_stop();
        assert_eq!(stop.push("a. b").0, "a.");
        assert_eq!(stop.push("more").0, "");
    }
}
