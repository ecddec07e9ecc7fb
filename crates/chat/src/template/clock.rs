//! The time that `strftime_now` tells, handed in by the caller.

use std::fmt::Write as _;

/// A local date and time, in seconds since 1970-01-01T00:00:00 of the local clock.
///
/// ```
/// let time = updraft_chat::LocalTime::from_seconds(1_795_305_600);
/// assert_eq!(time.strftime("%d %b %Y, %A"), "22 Nov 2026, Sunday");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LocalTime {
    seconds: i64,
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = [
    "Sunday",
    "Monday",
    "Tuesday",
    "Wednesday",
    "Thursday",
    "Friday",
    "Saturday",
];

impl LocalTime {
    /// The time this many seconds after 1970-01-01T00:00:00 of the local clock:
    /// Unix time plus the zone's offset.
    pub fn from_seconds(seconds: i64) -> LocalTime {
        LocalTime { seconds }
    }

    /// The midnight a day begins with, which is written as in RFC 3339.
    ///
    /// ```
    /// use updraft_chat::LocalTime;
    ///
    /// let time = LocalTime::from_date("2026-11-22").unwrap();
    /// assert_eq!(time.strftime("%d %b %Y %T"), "22 Nov 2026 00:00:00");
    /// assert_eq!(LocalTime::from_date("2026-02-29"), None);
    /// ```
    pub fn from_date(date: &str) -> Option<LocalTime> {
        let is_form = |(at, byte): (usize, u8)| match at {
            4 | 7 => byte == b'-',
            _ => byte.is_ascii_digit(),
        };
        if date.len() != 10 || !date.bytes().enumerate().all(is_form) {
            return None;
        }
        let year: i64 = date[..4].parse().ok()?;
        let month: i64 = date[5..7].parse().ok()?;
        let day: i64 = date[8..].parse().ok()?;
        // The inverse of `date`, by the same author's `days_from_civil`.
        let shifted_year = year - i64::from(month <= 2);
        let era = shifted_year.div_euclid(400);
        let year_of_era = shifted_year.rem_euclid(400);
        let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
        let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
        let time = LocalTime::from_seconds((era * 146_097 + day_of_era - 719_468) * 86_400);
        (time.strftime("%Y-%m-%d") == date).then_some(time)
    }

    /// The time of a clock that runs on UTC.
    pub fn utc(time: std::time::SystemTime) -> LocalTime {
        let seconds = match time.duration_since(std::time::UNIX_EPOCH) {
            Ok(after) => i64::try_from(after.as_secs()).unwrap_or(i64::MAX),
            Err(before) => -i64::try_from(before.duration().as_secs()).unwrap_or(i64::MAX),
        };
        LocalTime { seconds }
    }

    /// Year, month (1 to 12) and day (1 to 31), by the algorithm of Howard
    /// Hinnant's `civil_from_days`.
    fn date(self) -> (i64, usize, i64) {
        let days = self.seconds.div_euclid(86_400) + 719_468;
        let era = days.div_euclid(146_097);
        let day_of_era = days.rem_euclid(146_097);
        let year_of_era =
            (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let shifted = (5 * day_of_year + 2) / 153;
        let day = day_of_year - (153 * shifted + 2) / 5 + 1;
        let month = if shifted < 10 {
            shifted + 3
        } else {
            shifted - 9
        };
        let year = year_of_era + era * 400 + i64::from(month <= 2);
        (year, month as usize, day)
    }

    /// The day of the year, from 1.
    fn ordinal(self) -> i64 {
        let (year, month, day) = self.date();
        let before = [0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334][month - 1];
        let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
        before + day + i64::from(leap && month > 2)
    }

    /// Formats like C's `strftime` in the C locale. What it does not know
    /// stays as written.
    pub fn strftime(self, format: &str) -> String {
        let mut text = String::with_capacity(format.len() * 2);
        let mut rest = format.chars();
        while let Some(c) = rest.next() {
            if c != '%' {
                text.push(c);
                continue;
            }
            match rest.next() {
                Some('-') => match rest.next() {
                    Some(unit) => {
                        let mut padded = String::new();
                        self.write(unit, &mut padded);
                        let bare = padded.trim_start_matches(['0', ' ']);
                        text.push_str(if bare.is_empty() { "0" } else { bare });
                    }
                    None => text.push_str("%-"),
                },
                Some(unit) => self.write(unit, &mut text),
                None => text.push('%'),
            }
        }
        text
    }

    fn write(self, unit: char, text: &mut String) {
        let (year, month, day) = self.date();
        let second_of_day = self.seconds.rem_euclid(86_400);
        let (hour, minute, second) = (
            second_of_day / 3_600,
            second_of_day / 60 % 60,
            second_of_day % 60,
        );
        let hour12 = (hour + 11) % 12 + 1;
        let weekday = DAYS[(self.seconds.div_euclid(86_400) + 4).rem_euclid(7) as usize];
        let month_name = MONTHS[month - 1];
        // Writing to a string cannot fail.
        let _ = match unit {
            'Y' => write!(text, "{year}"),
            'y' => write!(text, "{:02}", year.rem_euclid(100)),
            'm' => write!(text, "{month:02}"),
            'd' => write!(text, "{day:02}"),
            'e' => write!(text, "{day:2}"),
            'j' => write!(text, "{:03}", self.ordinal()),
            'B' => write!(text, "{month_name}"),
            'b' | 'h' => write!(text, "{}", &month_name[..3]),
            'A' => write!(text, "{weekday}"),
            'a' => write!(text, "{}", &weekday[..3]),
            'H' => write!(text, "{hour:02}"),
            'I' => write!(text, "{hour12:02}"),
            'M' => write!(text, "{minute:02}"),
            'S' => write!(text, "{second:02}"),
            'f' => write!(text, "000000"),
            'p' => write!(text, "{}", if hour < 12 { "AM" } else { "PM" }),
            'F' => write!(text, "{year}-{month:02}-{day:02}"),
            'T' => write!(text, "{hour:02}:{minute:02}:{second:02}"),
            'R' => write!(text, "{hour:02}:{minute:02}"),
            'D' | 'x' => write!(text, "{month:02}/{day:02}/{:02}", year.rem_euclid(100)),
            'X' => write!(text, "{hour:02}:{minute:02}:{second:02}"),
            's' => write!(text, "{}", self.seconds),
            'Z' | 'z' => Ok(()), // a naive time has no zone
            'n' => text.write_char('\n'),
            't' => text.write_char('\t'),
            '%' => text.write_char('%'),
            other => write!(text, "%{other}"),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::LocalTime;

    #[track_caller]
    fn check(seconds: i64, format: &str, expected: &str) {
        assert_eq!(
            LocalTime::from_seconds(seconds).strftime(format),
            expected,
            "{format}"
        );
    }

    #[test]
    fn a_date_is_read_as_it_is_written() {
        for days in (-719_162..2_932_896).step_by(97) {
            let time = LocalTime::from_seconds(days * 86_400);
            let year = time.strftime("%Y");
            let date = format!("{year:0>4}{}", time.strftime("-%m-%d"));
            let found = LocalTime::from_date(&date).filter(|_| year.len() == 4);
            assert_eq!(found, Some(time).filter(|_| year.len() == 4), "{date}");
        }
        for wrong in [
            "",
            "2026-1-22",
            "2026-13-01",
            "2026-00-10",
            "2026-04-31",
            "2100-02-29",
            "+026-11-22",
            "2026/11/22",
            "2026-11-22T",
            "２026-11-2",
        ] {
            assert_eq!(LocalTime::from_date(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn formats_like_python() {
        // Expected values by Python 3.12's datetime.strftime.
        check(0, "%Y-%m-%d %H:%M:%S %a", "1970-01-01 00:00:00 Thu");
        check(
            951_782_399,
            "%d %B %Y %j %I %p",
            "28 February 2000 059 11 PM",
        );
        check(951_782_400, "%-d %b %y %j %-I%p", "29 Feb 00 060 12AM");
        check(1_709_251_199, "%F %T %e", "2024-02-29 23:59:59 29");
        check(-1, "%F %T", "1969-12-31 23:59:59");
        check(1_795_305_600, "100%% %Q", "100% %Q");
        check(4_107_542_400, "%A %d.%m.%Y", "Monday 01.03.2100");
    }
}
