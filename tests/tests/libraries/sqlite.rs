//! SQLite with a database in memory and callbacks of the program. The domain has the library's data.

use super::*;

type Function = unsafe extern "C" fn(*mut c_void, c_int, *mut *mut c_void);

const OK: c_int = 0;
const MISUSE: c_int = 21;
const ROW: c_int = 100;
const DONE: c_int = 101;
const UTF8: c_int = 1;
/// `SQLITE_TRANSIENT`: SQLite copies the text.
const TRANSIENT: *const c_void = usize::MAX as *const c_void;

#[link(name = "libsqlite3.so.0", kind = "dylib", modifiers = "+verbatim")]
unsafe extern "C" {
    fn sqlite3_open(name: *const c_char, database: *mut *mut c_void) -> c_int;
    fn sqlite3_close(database: *mut c_void) -> c_int;
    fn sqlite3_exec(
        database: *mut c_void,
        sql: *const c_char,
        row: *const c_void,
        argument: *mut c_void,
        message: *mut *mut c_char,
    ) -> c_int;
    fn sqlite3_prepare_v2(
        database: *mut c_void,
        sql: *const c_char,
        length: c_int,
        statement: *mut *mut c_void,
        rest: *mut *const c_char,
    ) -> c_int;
    fn sqlite3_bind_int64(statement: *mut c_void, index: c_int, value: i64) -> c_int;
    fn sqlite3_bind_text(
        statement: *mut c_void,
        index: c_int,
        text: *const u8,
        length: c_int,
        destructor: *const c_void,
    ) -> c_int;
    fn sqlite3_step(statement: *mut c_void) -> c_int;
    fn sqlite3_reset(statement: *mut c_void) -> c_int;
    fn sqlite3_column_text(statement: *mut c_void, column: c_int) -> *const c_char;
    fn sqlite3_column_int64(statement: *mut c_void, column: c_int) -> i64;
    fn sqlite3_finalize(statement: *mut c_void) -> c_int;
    fn sqlite3_create_function(
        database: *mut c_void,
        name: *const c_char,
        arguments: c_int,
        encoding: c_int,
        data: *mut c_void,
        function: Option<Function>,
        step: Option<Function>,
        last: Option<unsafe extern "C" fn(*mut c_void)>,
    ) -> c_int;
    fn sqlite3_user_data(context: *mut c_void) -> *mut c_void;
    fn sqlite3_value_int64(value: *mut c_void) -> i64;
    fn sqlite3_result_int64(context: *mut c_void, value: i64);
}

/// A database in memory.
struct Database(*mut c_void);

impl Database {
    fn open() -> Self {
        let mut database = null_mut();
        // SAFETY: the name is a C string, and `database` is writable.
        assert_eq!(unsafe { sqlite3_open(c":memory:".as_ptr(), &raw mut database) }, OK);
        Self(database)
    }

    /// A database with a table of a thousand rows.
    fn filled() -> Self {
        let database = Self::open();
        database.run(c"create table word (id integer primary key, text text, weight integer)");
        database.run(c"begin");
        let insert = database.prepare(c"insert into word (text, weight) values (?1, ?2)");
        for (number, noise) in numbers().take(1000).enumerate() {
            let text = format!("word {:04} of {number}", noise % 5000);
            // SAFETY: the statement is prepared, and the text has this length.
            unsafe {
                let (start, length) = (text.as_ptr(), text.len() as c_int);
                sqlite3_bind_text(insert, 1, start, length, TRANSIENT);
                sqlite3_bind_int64(insert, 2, i64::from(noise >> 16));
                assert_eq!(sqlite3_step(insert), DONE);
                sqlite3_reset(insert);
            }
        }
        // SAFETY: the statement is not used again.
        unsafe { sqlite3_finalize(insert) };
        database.run(c"commit; create index by_text on word (text)");
        database
    }

    fn run(&self, sql: &CStr) {
        assert_eq!(self.run_and_tell(sql, null_mut()), OK);
    }

    /// Runs statements. At the end SQLite writes a pointer to the error message, or null, to `message` unless that is
    /// null.
    fn run_and_tell(&self, sql: &CStr, message: *mut u8) -> c_int {
        // SAFETY: SQLite detects if the database is not open. A domain must not write `message`.
        unsafe { sqlite3_exec(self.0, sql.as_ptr(), null(), null_mut(), message.cast()) }
    }

    fn prepare(&self, sql: &CStr) -> *mut c_void {
        let mut statement = null_mut();
        // SAFETY: the database is open, and `statement` is writable.
        let result = unsafe { sqlite3_prepare_v2(self.0, sql.as_ptr(), -1, &raw mut statement, null_mut()) };
        assert_eq!(result, OK);
        statement
    }

    /// Returns the rows of a query with two columns, a text and a number.
    fn rows(&self, sql: &CStr) -> Vec<(String, i64)> {
        let query = self.prepare(sql);
        let mut rows = Vec::new();
        // SAFETY: the statement is prepared and at a row. The text is a C string that lives until the next step.
        unsafe {
            while sqlite3_step(query) == ROW {
                let text = CStr::from_ptr(sqlite3_column_text(query, 0));
                rows.push((text.to_str().unwrap().to_owned(), sqlite3_column_int64(query, 1)));
            }
            sqlite3_finalize(query);
        }
        rows
    }

    /// Defines an SQL function that returns its argument. It makes the mistake, if there is one, in the middle of the
    /// table.
    fn define_identity(&self, mistake: *mut u8) {
        unsafe extern "C" fn identity(context: *mut c_void, _: c_int, arguments: *mut *mut c_void) {
            // SAFETY: the function has one argument. The user data is the pointer passed below.
            unsafe {
                let (value, place) = (sqlite3_value_int64(*arguments), sqlite3_user_data(context));
                if value == 500 && !place.is_null() {
                    scribble(place.cast());
                }
                sqlite3_result_int64(context, value);
            }
        }
        let name = c"identity".as_ptr();
        // SAFETY: the database is open, and the function has the type that SQLite expects.
        let result = unsafe {
            let identity: Function = identity;
            sqlite3_create_function(self.0, name, 1, UTF8, mistake.cast(), Some(identity), None, None)
        };
        assert_eq!(result, OK);
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        // SAFETY: the database is open, and all its statements are finalized.
        assert_eq!(unsafe { sqlite3_close(self.0) }, OK);
    }
}

/// Fills a table and queries it. The query calls a function of the test.
fn query_words() -> Vec<(String, i64)> {
    let database = Database::filled();
    database.define_identity(null_mut());
    let mut rows = database.rows(c"select text, identity(id) from word where weight % 97 = 0 order by text desc");
    rows.extend(database.rows(c"select group_concat(distinct substr(text, 6, 2)), sum(weight) from word"));
    rows
}

/// The mistake happens in a function that SQLite calls for each row of a query.
fn query_with_mistake(place: *mut u8) {
    let database = Database::filled();
    database.define_identity(place);
    assert_eq!(database.rows(c"select 'sum', sum(identity(id)) from word")[0].1, 500_500);
}

/// The mistake is a write of SQLite itself: the error message of statements, while it holds the database's lock.
fn insert_with_mistake(place: *mut u8) {
    let database = Database::filled();
    let sql = c"begin; insert into word (text, weight) select text, weight + 1 from word; commit";
    assert_eq!(database.run_and_tell(sql, place), OK);
}

/// Runs the controls and makes a domain that has SQLite's data. Returns it with the result of the work outside.
///
/// The controls initialise SQLite outside the domain, as a program that used it before would.
fn domain_with_sqlite() -> (Domain, Vec<(String, i64)>) {
    drop(domain("first"));
    let expected = query_words();
    lands(query_with_mistake);
    lands(insert_with_mistake);
    // SAFETY: from here on, this process uses the library only in that domain.
    (build(unsafe { Domain::builder("sqlite").library("libsqlite3.so") }), expected)
}

pub(crate) fn fills_and_queries_a_table() {
    let (mut domain, expected) = domain_with_sqlite();
    let sum = expected.last().unwrap().1;
    println!("figure: the answer has {} of 1000 rows, and a sum of {sum}", expected.len() - 1);
    works_as_outside(&mut domain, &expected, query_words);
    let target = Target::new();
    assert_in_scribble(&is_stopped(&mut domain, &target, query_with_mistake));
    works_as_outside(&mut domain, &expected, query_words);
    assert_in_library(&is_stopped(&mut domain, &target, insert_with_mistake), "libsqlite3.so");
    works_as_outside(&mut domain, &expected, query_words);
}

pub(crate) fn a_database_lasts_from_call_to_call_until_a_violation() {
    let (mut domain, _) = domain_with_sqlite();
    let open = || {
        let database = Database::filled();
        let handle = database.0 as usize;
        std::mem::forget(database);
        handle
    };
    let handle = domain.call(open).unwrap();
    let kept = || ManuallyDrop::new(Database(handle as *mut c_void));
    let delete_some = || {
        kept().run(c"delete from word where id in (select id from word limit 10)");
        kept().rows(c"select 'rows', count(*) from word")[0].1
    };
    assert_eq!([domain.call(delete_some).unwrap(), domain.call(delete_some).unwrap()], [990, 980]);
    is_stopped(&mut domain, &Target::new(), query_with_mistake);
    let result = domain.call(|| kept().run_and_tell(c"select 1", null_mut()));
    assert_eq!(result.unwrap(), MISUSE, "the violation has discarded the database");
}

/// Returns the resident set size of this process, in bytes.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/statm").unwrap();
    status.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

pub(crate) fn fifty_mistakes_leave_nothing_behind() {
    let (mut domain, expected) = domain_with_sqlite();
    let target = Target::new();
    let mut round = |number| {
        let mistake = if number % 2 == 0 { query_with_mistake } else { insert_with_mistake };
        domain.call(|| mistake(target.0)).expect_err("the call must end with a violation");
        works_as_outside(&mut domain, &expected, query_words);
        resident()
    };
    let first = [round(0), round(1)];
    let last = (2..50).map(round).last().unwrap();
    println!("figure: resident after 2 mistakes: {} KiB, after 50: {} KiB", first[1] / 1024, last / 1024);
    assert!(last < first[1] + (256 << 10));
    assert!(target.is_untouched());
}
