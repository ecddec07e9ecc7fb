//! Letter counting: the conversations that teach it and the questions that judge it.
//!
//! An answer first goes through the word, as the base model does when it marks
//! a letter, but numbers the marks; then it states the number:
//!
//! ```text
//! How many r's are in the word 'strawberry'?
//! Each r: s- t- r1 a- w- b- e- r2 r3 y-: there are 3 r's.
//! ```
//!
//! Half of the words are English (`words.txt`), half are invented from
//! syllables. [`is_judged`] splits all of them by a hash, and the generator of
//! the tiny model (`../assets/tiny/generate.py`) splits by the same hash, so a
//! judged word is one that neither pre-training nor training has shown.
//! Everything is a pure function of the seed.

use std::collections::HashSet;
use std::sync::LazyLock;

/// One judging question with the number it asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// A word that [`is_judged`].
    pub word: String,
    /// The letter to count in it.
    pub letter: char,
    /// What the model is asked.
    pub prompt: String,
    /// How often `letter` occurs in `word`, 0 to 4.
    pub answer: u32,
}

/// The question everybody asks first; "strawberry" is a judged word.
pub fn demo_question() -> Question {
    Question::new("strawberry".into(), 'r', PHRASINGS[0])
}

/// `count` training conversations as JSON lines, in ShareGPT form.
pub fn conversations(seed: u64, count: usize) -> impl Iterator<Item = String> {
    let mut rng = Rng(seed);
    (0..count).map(move |i| {
        let Question { word, letter, prompt, .. } = draw(&mut rng, i, |word| !is_judged(word));
        // Prompts and answers hold neither double quotes nor backslashes: no escapes.
        format!(
            r#"{{"conversations":[{{"from":"human","value":"{prompt}"}},{{"from":"gpt","value":"{}"}}]}}"#,
            counted(&word, letter)
        )
    })
}

/// `count` questions about different judged words, the demo question first.
///
/// The answers 0 to 4 take turns: whoever always says the same number is right
/// one time in five.
pub fn questions(seed: u64, count: usize) -> Vec<Question> {
    let mut rng = Rng(!seed);
    let demo = demo_question();
    let mut seen = HashSet::from([demo.word.clone()]);
    let rest = (1..count).map(|i| {
        let question = draw(&mut rng, i + DEMO_ANSWER, |word| {
            is_judged(word) && !seen.contains(word)
        });
        seen.insert(question.word.clone());
        question
    });
    let rest: Vec<_> = rest.collect();
    std::iter::once(demo).chain(rest).take(count).collect()
}

/// The number a reply ends on: its last run of digits.
pub fn parse_answer(reply: &str) -> Option<u32> {
    reply
        .rsplit(|c: char| !c.is_ascii_digit())
        .find(|digits| !digits.is_empty())
        .and_then(|digits| digits.parse().ok())
}

/// Whether a word is kept for judging: FNV-1a (64 bits) of the lower-case word,
/// modulo 5, equals 3. That is every fifth word, "strawberry" among them.
pub fn is_judged(word: &str) -> bool {
    let hash = word
        .to_lowercase()
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
    hash % 5 == 3
}

/// Ways to ask; `{l}` is the letter, `{w}` the word.
const PHRASINGS: [&str; 6] = [
    "How many {l}'s are in the word '{w}'?",
    "How many {l}'s are in '{w}'?",
    "How many {l}'s does '{w}' have?",
    "How many times does {l} appear in '{w}'?",
    "How often is the letter {l} in '{w}'?",
    "Count the {l}'s in '{w}'.",
];

static ENGLISH: LazyLock<Vec<&str>> =
    LazyLock::new(|| include_str!("words.txt").split_whitespace().collect());
const NUM_ANSWERS: usize = 5;
const DEMO_ANSWER: usize = 3;
const MAX_LETTERS: usize = 10;

impl Question {
    fn new(word: String, letter: char, phrasing: &str) -> Self {
        let prompt = phrasing
            .replace("{l}", letter.encode_utf8(&mut [0; 4]))
            .replace("{w}", &word);
        let answer = count(&word, letter);
        Self {
            word,
            letter,
            prompt,
            answer,
        }
    }
}

fn count(word: &str, letter: char) -> u32 {
    word.chars().map(|c| u32::from(c == letter)).sum()
}

/// The answer that trains: the word with numbered marks, then the sentence.
fn counted(word: &str, letter: char) -> String {
    let mut seen = 0;
    let marked: Vec<String> = word
        .chars()
        .map(|c| match c == letter {
            true => {
                seen += 1;
                format!("{c}{seen}")
            }
            false => format!("{c}-"),
        })
        .collect();
    let sentence = match seen {
        1 => format!("there is 1 {letter}."),
        _ => format!("there are {seen} {letter}'s."),
    };
    format!("Each {letter}: {}: {sentence}", marked.join(" "))
}

/// Draws words until one is allowed and has a letter that occurs `turn % 5` times.
fn draw(rng: &mut Rng, turn: usize, allowed: impl Fn(&str) -> bool) -> Question {
    let wanted = (turn % NUM_ANSWERS) as u32;
    loop {
        let word = match rng.chance(50) {
            true => rng.pick(&ENGLISH).to_string(),
            false => invented(rng),
        };
        let letters: Vec<char> = ('a'..='z').filter(|&l| count(&word, l) == wanted).collect();
        if allowed(&word) && !letters.is_empty() {
            return Question::new(word, *rng.pick(&letters), rng.pick::<&str>(&PHRASINGS));
        }
    }
}

/// A pronounceable word of 3 to 10 letters that likes to repeat itself.
fn invented(rng: &mut Rng) -> String {
    const ONSETS: &[u8] = b"bcdfghjklmnpqrstvwxyz";
    const VOWELS: &[u8] = b"aeiouy";
    const CODAS: &[u8] = b"dlmnrst";
    let favourites = [*rng.pick(ONSETS), *rng.pick(VOWELS), *rng.pick(CODAS)];
    let mut word = String::new();
    for _ in 0..2 + rng.below(3) {
        for (letters, favourite, likely) in [
            (ONSETS, favourites[0], 100),
            (VOWELS, favourites[1], 100),
            (CODAS, favourites[2], 30),
        ] {
            if rng.chance(likely) {
                let letter = if rng.chance(50) {
                    favourite
                } else {
                    *rng.pick(letters)
                };
                let copies = if rng.chance(10) { 2 } else { 1 };
                (0..copies).for_each(|_| word.push(char::from(letter)));
            }
        }
    }
    word.truncate(MAX_LETTERS);
    word
}

/// SplitMix64 (Steele, Lea and Flood 2014): tiny, and the same everywhere.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    fn pick<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        &items[self.below(items.len())]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The last quoted word of a training line's question, and the reply.
    fn word_and_reply(line: &str) -> (&str, &str) {
        let (prompt, reply) = line
            .split_once(r#""},{"from":"gpt","value":""#)
            .expect("two turns");
        (
            prompt.rsplit('\'').nth(1).expect("a quoted word"),
            reply.trim_end_matches(r#""}]}"#),
        )
    }

    #[test]
    fn training_and_judging_share_no_word() {
        let judged: HashSet<String> = questions(1, 400).into_iter().map(|q| q.word).collect();
        assert_eq!(judged.len(), 400, "every question has its own word");
        assert!(judged.iter().all(|word| is_judged(word)));
        for line in conversations(1, 5_000) {
            let (word, _) = word_and_reply(&line);
            assert!(!is_judged(word) && !judged.contains(word), "{word}");
        }
    }

    #[test]
    fn no_constant_answer_is_right_more_than_three_times_in_ten() {
        for seed in 0..4 {
            let questions = questions(seed, 320);
            for answer in 0..NUM_ANSWERS as u32 {
                let right = questions.iter().filter(|q| q.answer == answer).count();
                assert!(
                    right * 10 <= questions.len() * 3,
                    "{answer} is right {right} times"
                );
            }
        }
    }

    #[test]
    fn training_answers_are_true_and_parse() {
        for line in conversations(2, 2_000) {
            let (word, reply) = word_and_reply(&line);
            let [letter, marked, _] = reply.split(": ").collect::<Vec<_>>()[..] else {
                panic!("three parts: {reply}")
            };
            let letter = letter.chars().last().expect("a letter");
            let spelled: String = marked.chars().filter(char::is_ascii_alphabetic).collect();
            assert_eq!(spelled, word);
            assert_eq!(parse_answer(reply), Some(count(word, letter)), "{reply}");
        }
    }

    #[test]
    fn the_same_seed_gives_the_same_data() {
        assert!(conversations(7, 50).eq(conversations(7, 50)));
        assert!(!conversations(7, 50).eq(conversations(8, 50)));
        assert_eq!(questions(7, 50), questions(7, 50));
    }

    #[test]
    fn the_demo_question_comes_first_and_is_unseen() {
        let demo = questions(3, 1).remove(0);
        assert_eq!(demo, demo_question());
        assert_eq!(demo.prompt, "How many r's are in the word 'strawberry'?");
        assert!(demo.answer == 3 && is_judged(&demo.word));
        assert_eq!(
            counted(&demo.word, 'r'),
            "Each r: s- t- r1 a- w- b- e- r2 r3 y-: there are 3 r's."
        );
    }

    #[test]
    fn a_reply_is_judged_by_its_last_number() {
        let check = |reply, expected| assert_eq!(parse_answer(reply), expected, "{reply}");
        check("Each r: b- a- r1: there is 1 r.", Some(1));
        check("There are 2, no, 12 of them.", Some(12));
        check("I can spell it, but I never learned to count.", None);
        check("", None);
        check("99999999999999999999", None);
    }
}
