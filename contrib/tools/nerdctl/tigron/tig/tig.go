// Package tig stands in for nerdctl's own, unpublished test module: one type of it is named by code
// that nerdctl builds in.
package tig

// T is the part of a test's handle that is used.
type T interface {
	Helper()
	FailNow()
	Fail()
	Log(args ...any)
	Name() string
	TempDir() string
	Skip(args ...any)
}
